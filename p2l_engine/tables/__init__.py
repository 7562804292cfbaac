"""What stands in a file, row by row; how a file is written whole or not at all."""
