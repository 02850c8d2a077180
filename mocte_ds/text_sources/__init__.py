"""A corpus made of texts in packages: which there are, how each is read, and a folder of them with their licences."""
