"""The passes, one a file: the file's name is the pass's name. Files that begin with `_` are no passes."""
