"""What is made by scripts: pages, pictures, reference values, the table of architectures."""
