"""Run folders: where runs are kept, what identifies them, what they say."""
