"""The log of a server's decisions, and what people said about them."""
