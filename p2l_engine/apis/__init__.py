"""What a request says, in the API of any provider, and what its answer says."""
