"""Facts for `jmoe doctor` to print: of the machine, of a model, of its text files and of its loss."""
