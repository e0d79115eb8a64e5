"""Pictures and what belongs to them: files, arrays in memory, changes made to both."""
