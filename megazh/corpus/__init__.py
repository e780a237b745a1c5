"""Raw text: which files there are, how they are cut, and the documents in them."""
