"""Room 9, the command line: verbs, flags, exit codes, printing. Knows how nothing works."""
