"""Evidence, approval and history of registered versions."""
