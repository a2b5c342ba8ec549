"""What a model's maps are worth: scores beside nulls, ceilings and protocols. See `evaluate`."""
