"""Studies: one file in, every cell trained and scored through the services, tables out."""
