"""Where text comes from, what a record means, and how records become token batches."""
