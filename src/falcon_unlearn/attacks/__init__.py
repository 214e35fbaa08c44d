"""Knowledge-recovery attacks: what an unlearned model gives away under pressure, measured as routinely as a metric."""
