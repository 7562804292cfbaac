"""Stores of files behind URIs (s3://, gs://, and what fsspec knows): keys as they are written, and errors in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from urllib.parse import quote

from pyarrow import ArrowException, PythonFile, fs

OPTIONS = re.compile(r"\?[^?/=]+=.*$", re.DOTALL)  # other question marks belong to the key
RETRIED = 10  # seconds for which Google's store is asked again: pyarrow's own limit is a quarter of an hour
BY_PYARROW = {"file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"}  # where its build has them

REMEDIES = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID with its secret key, and AWS_DEFAULT_REGION or ?region=",
    "gs": "log in with gcloud auth application-default login, or write gs://anonymous@bucket for a public one",
    "abfs": "write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/, and log in with az login or set AZURE_CLIENT_ID",
    "hf": "set HF_TOKEN, or log in with hf auth login",
}
REMEDIES |= {"gcs": REMEDIES["gs"], "abfss": REMEDIES["abfs"]}


def shown(uri: str) -> str:
    """A path or URI as messages may show it: without a store's options, keys and secrets."""
    return uri if "://" not in uri else re.sub("//([^/@]*|[^/@:]*:[^@]*)@", "//", OPTIONS.sub("", uri))


def store_of(uri: str, literal: bool = False) -> tuple[Any, str]:
    """A store and the path within it. A key may have any character; %20 is a space, unless literal. Raises ValueError."""
    scheme = uri.partition("://")[0]
    if scheme == "file":
        if any(sign in uri for sign in "?#"):
            raise ValueError(f"{uri}: expected %3F for a question mark, and %23 for #, in a URI")
        encoded = uri
    else:
        encoded = _encoded(uri, literal)
    if scheme in BY_PYARROW:
        try:
            store, path = fs.FileSystem.from_uri(encoded)
            return store, path
        except (ArrowException, OSError) as error:
            if "Unrecognized filesystem" not in str(error):
                problem = str(error).replace(encoded, shown(uri)).replace(uri, shown(uri))
                raise ValueError(_refusal(uri, problem)) from None
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(uri)
    except Exception as error:  # of any package
        raise ValueError(_refusal(uri, _one_line(error).replace(uri, shown(uri)))) from error
    return fs.PyFileSystem(_Handler(system)), path


@contextmanager
def reaching(uri: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turns what a store raises where it does not answer into one line, of this kind of exception. uri: as it is shown."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ArrowException) as error:
        raise kind(_refusal(uri, f"the store does not answer: {_one_line(error)}")) from error


def _encoded(uri: str, literal: bool) -> str:
    options = OPTIONS.search(uri)
    place = OPTIONS.sub("", uri)
    scheme, _, rest = place.partition("://")
    authority, slash, key = rest.partition("/")
    key = key.replace("%", "%25") if literal else re.sub("%(?![0-9A-Fa-f]{2})", "%25", key)
    key = quote(key, safe="/%:@!$&'()*,;=+~")
    query = options.group()[1:] if options else ""
    if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in query:
        query += f"{'&' if query else ''}retry_limit_seconds={RETRIED}"
    return f"{scheme}://{authority}{slash}{key}" + (f"?{query}" if query else "")


def _refusal(uri: str, problem: str) -> str:
    remedy = REMEDIES.get(uri.partition("://")[0], "check its package, its credentials and the network")
    return f"{shown(uri)}: {' '.join(problem.split()).rstrip('.'):.400}; {remedy}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError | ValueError | ImportError) and text else f"{type(error).__name__}: {text}"


def _with_os_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Any package's exceptions as an OSError, which is what readers of files expect."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError:
            raise
        except Exception as error:
            raise OSError(_one_line(error)) from error

    return call


class _Handler(fs.FSSpecHandler):  # type: ignore[misc]
    get_file_info = _with_os_errors(fs.FSSpecHandler.get_file_info)
    get_file_info_selector = _with_os_errors(fs.FSSpecHandler.get_file_info_selector)
    create_dir = _with_os_errors(fs.FSSpecHandler.create_dir)
    delete_file = _with_os_errors(fs.FSSpecHandler.delete_file)
    open_output_stream = _with_os_errors(fs.FSSpecHandler.open_output_stream)

    @_with_os_errors
    def open_input_file(self, path: str) -> PythonFile:
        return PythonFile(_Opened(self.fs.open(path, mode="rb")), mode="r")

    open_input_stream = open_input_file


class _Opened:
    """A file of an fsspec store whose methods raise OSError alone."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        return _with_os_errors(found) if callable(found) else found
