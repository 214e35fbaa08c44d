"""One file a method: which forward passes feed which objective."""
