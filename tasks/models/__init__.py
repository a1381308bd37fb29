"""Model folders: loading, quantisation, devices, safetensors files."""
