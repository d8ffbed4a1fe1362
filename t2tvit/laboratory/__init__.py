"""What is done with models besides training them: tables, predictions, pictures, exports."""
