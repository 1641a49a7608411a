"What every local page needs: headers, JSON, errors, checks of where a request comes from, a server."
import asyncio
import errno
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CSP = ("default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
       "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'")
HEADERS = {'Content-Security-Policy': CSP, 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer',
           'Cache-Control': 'no-store'}
PUBLIC = '0.0.0.0', '::'                     # addresses that listen to every network
HOST = re.compile(r'(\[[0-9a-f:.]+\]|[\w.-]+)(?::(\d{1,5}))?', re.ASCII | re.IGNORECASE)      # name[:port]
PREFIX = re.compile(r'[\w~-][\w./~-]*', re.ASCII)       # of a path: it is shown as part of a command
PORTS = dict(http='80', https='443')         # which an address leaves out
OWN_SITES = '', 'same-origin', 'none'        # Sec-Fetch-Site: of no browser, of this page, entered by a person
ADDRESSES = '*'                              # among host names: every IP address
IDLE_SECONDS = 30                            # without a byte of a request; then it ends
UPLOAD_SECONDS = 120                         # for a request to arrive, however steadily its bytes come
STOP_SECONDS = 5                             # for requests at work after Ctrl-C; `docker stop` kills after 10
CLIENT_GONE = 499                            # status in the log: nobody receives it
MORE_HEADERS = {408: {'Connection': 'close'}, 503: {'Retry-After': '5'}}
FOREIGN = 'requests of other web sites are refused: enter the address of the page in the address bar'


class RequestError(Exception):
    "A request that cannot be served: HTTP status and reason."
    def __init__(self, status: int, reason: str):
        super().__init__(status, reason)
        self.status, self.reason = status, reason


# Applications

def get_application(routes: Sequence, hosts: Sequence[str], lifespan: Any = None,
                    proxies: Sequence[str] = ()) -> 'Starlette':
    """Return a Starlette application whose errors are all JSON with the key `error`.

    It accepts only requests to `hosts` (`ADDRESSES`: every IP address) and `proxies`, so that no other web site can
    reach it through a host name of its own, and none that a page of another web site makes. Pages of `proxies`,
    name[:port], are its own, whatever header Host the proxy sends. A `RequestError` of a route becomes its status and
    reason.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    handlers: dict = {RequestError: _refused, HTTPException: _http_error, Exception: _failed}
    app = Starlette(routes=list(routes), lifespan=lifespan, exception_handlers=handlers,
                    middleware=[Middleware(OwnRequests, hosts=hosts, proxies=proxies)])
    app.router.redirect_slashes = False      # /api/ is an error, too: a redirection is no JSON
    return app


def json_reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> 'JSONResponse':
    "Return a JSON response with the headers of every page"
    from starlette.responses import JSONResponse
    return JSONResponse(content, status, headers={**HEADERS, **(headers or {})})


async def _refused(request: 'Request', e: RequestError) -> 'JSONResponse':
    if e.status == CLIENT_GONE: say(f'{request.method} {request.url.path}: {e.reason}')
    return json_reply(dict(error=e.reason), e.status, MORE_HEADERS.get(e.status))


async def _http_error(request: 'Request', e: 'HTTPException') -> 'JSONResponse':
    reasons = {404: f'no such path: {request.url.path}', 405: f'{request.method} is not allowed here'}
    return json_reply(dict(error=reasons.get(e.status_code, e.detail)), e.status_code, e.headers)


async def _failed(request: 'Request', e: Exception) -> 'JSONResponse':
    return json_reply(dict(error=f'internal error ({type(e).__name__}); the terminal of the server shows it'), 500)


# Where a request comes from

class OwnRequests:
    "ASGI middleware: status 400 for requests to another host name, 403 for those of another web site"
    def __init__(self, app: 'ASGIApp', hosts: Sequence[str], proxies: Sequence[str] = ()):
        self.app, self.proxies = app, proxies
        self.hosts = {host.strip('[]').casefold() for host in hosts} | {host_name(proxy) for proxy in proxies}

    async def __call__(self, scope: 'Scope', receive: 'Receive', send: 'Send') -> None:
        "Serve a request if it may be made"
        from starlette.datastructures import Headers
        if scope['type'] != 'http': return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        host = ', '.join(headers.getlist('host'))
        if not self.is_served(host): return await self._unknown(host)(scope, receive, send)
        followed = headers.get('sec-fetch-mode') == 'navigate' and not scope['path'].startswith('/api')        # a link
        is_own = followed or not is_foreign(headers, [host, *self.proxies])
        served: ASGIApp = self.app if is_own else json_reply(dict(error=FOREIGN), 403)
        await served(scope, in_time(receive), send)

    def is_served(self, host: str) -> bool:
        "Return whether requests with this header Host are served; HTTP/1.0 has none"
        name = host_name(host)
        return name in self.hosts or ADDRESSES in self.hosts and (is_address(name) or not host)

    def _unknown(self, host: str) -> 'JSONResponse':
        known = ', '.join([*sorted(self.hosts - {ADDRESSES}), *['the IP address'] * (ADDRESSES in self.hosts)])
        return json_reply(dict(error=f'host name {host[:80]!r} is not served here; use one of: {known}'), 400)


def host_name(header: str) -> str:
    "Return the host name of a Host header without its port: 'localhost:8000' -> 'localhost'; '' for no valid one"
    found = HOST.fullmatch(header)
    return found[1].strip('[]').casefold() if found else ''


def is_address(name: str) -> bool:
    "Return whether a host name is an IP address"
    try: ip_address(name)
    except ValueError: return False
    return True


def is_foreign(headers: Mapping[str, str], hosts: Sequence[str]) -> bool:
    "Return whether a browser sent a request for a page of none of `hosts`, name[:port]; curl is no browser"
    if headers.get('sec-fetch-site', '') not in OWN_SITES: return True
    return 'origin' in headers and not any(is_own_origin(headers['origin'], host) for host in hosts)


def is_own_origin(origin: str, host: str) -> bool:
    "Return whether the header Origin is host and port of the header Host, by http or https (a proxy may add TLS)"
    scheme, _, address = origin.partition('://')
    first, second = HOST.fullmatch(address), HOST.fullmatch(host)
    if scheme not in PORTS or not first or not second: return False
    (name, port), (own_name, own_port) = ((o[1].casefold(), o[2] or PORTS[scheme]) for o in (first, second))
    return (name, port) == (own_name, own_port)


# Requests

def in_time(receive: 'Receive') -> 'Receive':
    """Return the `receive` of ASGI whose body arrives or ends with a `RequestError`.

    Its status is 408 if no byte comes for `IDLE_SECONDS` or the last one not within `UPLOAD_SECONDS`, and 499 if the
    client has gone.
    """
    is_complete, deadline = False, time.monotonic() + UPLOAD_SECONDS

    async def receive_in_time() -> 'Message':
        nonlocal is_complete
        if is_complete: return await receive()
        left = deadline - time.monotonic()
        try:
            async with asyncio.timeout(min(IDLE_SECONDS, left)): message = await receive()
        except TimeoutError:
            slow = left < IDLE_SECONDS
            raise RequestError(408, f'the upload took more than {UPLOAD_SECONDS} s' if slow else
                               f'no byte of the request came for {IDLE_SECONDS} s') from None
        if message['type'] == 'http.disconnect': raise RequestError(CLIENT_GONE, 'the client has closed the connection')
        is_complete = not message.get('more_body', False)
        return message
    return receive_in_time


def own_url(request: 'Request') -> str:
    "Return the address of the server as the client enters it, with a slash at the end and the prefix of a proxy"
    prefix = request.headers.get('x-forwarded-prefix', '').strip('/')
    return f'{request.base_url}{prefix}/' if PREFIX.fullmatch(prefix) else str(request.base_url)


def with_seen_body(request: 'Request', see: Callable[[bytes], None]) -> 'Request':
    "Return a request that calls `see` with each part of its body that arrives"
    async def receive() -> 'Message':
        message = await request.receive()
        see(message.get('body', b''))
        return message
    return type(request)(request.scope, receive)


def content_length(request: 'Request', limit: float, what: str) -> int:
    "Return the size of a request's body in bytes. Raises `RequestError` if it is unknown or above `limit`, `what` fits"
    length = request.headers.get('content-length', '')
    if not length.isdecimal(): raise RequestError(411, 'header Content-Length is missing')
    if int(length) > limit: raise RequestError(413, f'at most {what} in one request')
    return int(length)


async def read_json(request: 'Request', limit: int, what: str) -> Any:
    "Return the JSON of a request of at most `limit` bytes. Raises `RequestError`; a form of another web site is none"
    if request.headers.get('content-type', '').partition(';')[0].strip() != 'application/json':
        raise RequestError(415, 'send application/json')
    content_length(request, limit, what)
    try:
        body = await request.json()
        encodable = is_unicode(json.dumps(body, ensure_ascii=False))
    except (ValueError, RecursionError): raise RequestError(400, 'no valid JSON') from None
    if not encodable: raise RequestError(400, 'a text is no Unicode: it has half of a surrogate pair')
    return body


def is_unicode(text: str) -> bool:
    "Return whether UTF-8 can encode a text: JSON and some character sets can hold halves of surrogate pairs"
    try: text.encode()
    except UnicodeEncodeError: return False
    return True


def text_of(body: dict, key: str, where: str = '') -> str:
    "Return a text of a request, '' if it is missing or null. Raises `RequestError` that names `where` and key"
    value = body.get(key)
    if value is None: return ''
    if isinstance(value, str): return value
    raise RequestError(400, f'{where}{key}: send a text')


# Servers

def require_packages(command: str, packages: Iterable[str]) -> None:
    "Raise `AptosError` if a package that a page needs is not installed"
    if all(find_spec(package) for package in packages): return
    raise AptosError(f'{command} needs the extra serve. Run `pip install starlette uvicorn python-multipart`.')


def trusted_hosts(host: str) -> list[str]:
    "Return the host names that a page on `host` accepts; say so if other machines can reach it"
    if host not in PUBLIC: return ['127.0.0.1', 'localhost', '::1', host]
    say(f'{host}: everyone who can reach this machine can use the page; it asks for no password', 'yellow')
    return ['localhost', socket.gethostname(), ADDRESSES]


def check_names(option: str, names: Sequence[str]) -> None:
    "Raise `AptosError` if one of the values of an option is no host name, with or without port"
    for name in names:
        if host_name(name): continue
        raise AptosError(f'{option} {name}: name the host as browsers do, such as grader.clinic.org, without https://')


def server_url(host: str, port: int) -> str:
    "Return the address of a page for people: that of this machine where it listens to every network"
    name = socket.gethostname() if host in PUBLIC else host
    return f'http://[{name}]:{port}' if ':' in name else f'http://{name}:{port}'


def run_server(app: 'ASGIApp', host: str, port: int, *notes: str) -> None:
    "Serve an ASGI application until it is stopped; print `notes` after its address. Raises `AptosError`"
    import uvicorn
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try: sock = socket.create_server((host, port), family=family, backlog=256)
    except OSError as e:
        other = 'port with --port' if e.errno in (errno.EADDRINUSE, errno.EACCES) else 'address with --host'
        reason = (e.strerror or str(e)).partition(' (while')[0]
        raise AptosError(f'{host}:{port}: cannot listen ({reason}). Choose another {other}.') from None
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level='warning', server_header=False,
                                           timeout_graceful_shutdown=STOP_SECONDS))
    logging.getLogger('uvicorn.error').addFilter(is_no_cancellation)
    threading.Thread(target=_announce, args=(server, server_url(host, port), notes), daemon=True).start()
    with sock: server.run(sockets=[sock])


def is_no_cancellation(record: logging.LogRecord) -> bool:
    "Return whether a line of the server's log is about anything but work that a stop has cancelled"
    return 'CancelledError' not in logging.Formatter().format(record)


def _announce(server: 'uvicorn.Server', url: str, notes: Sequence[str]) -> None:
    "Say the page's address once the server has started"
    while not server.started and not server.should_exit: time.sleep(.05)
    if not server.started: return
    first, *more = notes
    say(f'serving {url} (stop with Ctrl-C); {first}')
    for note in more: say(note)
