"""The benchmark: metafast and its peers on the same tasks, answers checked first (`python -m bench -h`)."""
