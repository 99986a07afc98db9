"""A version's files and every answer from them, without TensorFlow: queries, tables, reasons."""
