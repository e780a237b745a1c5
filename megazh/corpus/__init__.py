"""Raw text: source files, the pieces they are cut into, and the documents in them."""
