"""Programs as ONNX models: `export.export` makes one; the files ops_*.py say which standard ops compute each op of dsc."""
