"""Code shared by the examples. Their scripts put the folder above on the path and import from here."""
