"""The use cases: iterators in, records out; nothing here prints or exits."""
