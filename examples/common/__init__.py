"""What the examples share: their scripts put the folder above this one on the path, and import from here."""
