"""Stage `base`: the model that is tuned: of the hub, of a folder, imported, pretrained, or trained further."""
