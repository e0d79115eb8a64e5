"""Pictures with boxes: annotations in their formats, checked, and views of both together."""
