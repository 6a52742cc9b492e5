"""Commands, a module each: it reads options, calls a function of the package, and prints the result."""
