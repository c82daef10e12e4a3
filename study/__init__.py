"""Studies: one file in, every cell trained and scored through the services, tables out.

Each imports only those before it: `config`, `cells`, `folder`, `resolution`, `plan` and `services`, `driver` and
`printing`, `cli`. The services are reached by their commands and calls; none is imported here.
"""
