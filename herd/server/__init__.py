"""An HTTP server for one model: OpenAI's API, contexts, and the web page."""
