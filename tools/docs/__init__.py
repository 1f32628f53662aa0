"""The generated parts of ``docs/``, and what ``mkdocs`` needs beside them."""
