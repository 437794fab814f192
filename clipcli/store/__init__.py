"""What is kept between runs: keys and arrays in one SQLite file, never models."""
