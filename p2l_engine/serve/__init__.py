"""An HTTP server that routes each request to the best model that the money allows."""
