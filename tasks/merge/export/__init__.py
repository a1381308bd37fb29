"""Other forms of a merged model: GGUF, Ollama, safetensors, the hub."""
