"""The one reader of files: parquet, csv and jsonl from paths, folders, globs and URIs; and the one atomic writer.

``formats`` lists the file formats, each a module here; ``find`` names the files, ``chunked`` reads them in bounded memory with
typed columns, ``whole`` reads some of their columns into memory. Text and jsonl files on this machine need no pyarrow.
"""
