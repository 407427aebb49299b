"""Files as sources and sinks: JSON lines, CSV and Parquet, on this machine or wherever fsspec reaches."""
