"""Where rows lie: which expert each belongs to, where it comes from, and where its result goes."""
