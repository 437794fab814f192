"""Self-contained HTML: pages, tables, plots as SVG, thumbnails. It knows numbers and text, and no task."""
