"""The ops on show: a table of all, and a page for each with its derivation and sources. ``fbackprop ops`` prints them."""
