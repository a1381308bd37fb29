"""An HTTP server with OpenAI's API for registered models and model folders: `temper serve`."""
