"""Commands on any file or folder, without a workspace."""
