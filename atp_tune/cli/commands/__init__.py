"""Commands, a module each: options go in, a function of the package does the work, what comes back is printed."""
