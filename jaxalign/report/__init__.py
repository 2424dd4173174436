"""Reports: tables and pictures made from the library's results. Nothing of the library depends on this."""
