"""Every Redis key name and every Lua script of the session log (docs/session-log.md).

A script is what makes a step of the protocol whole: it reads, decides and writes at once. All keys
of a script carry the hash tag of one partition and are handed over in KEYS, so a Redis Cluster runs
it too. Redis 6.2 features only. The clock is the server's.

Redis refuses writes when its memory is full, but only as the first write of a script. The scripts
by which memory is freed or an owner keeps its lease therefore begin with a write that is always
let through; those that admit new data begin with one that is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GROUP = "encoders"
SESSION_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True)
class Keys:
    """Names of all keys. `prefix` keeps several applications apart on one server."""

    prefix: str

    @property
    def bus(self) -> str:
        """Hash: number of partitions and generation, written by the first client."""
        return f"{self.prefix}bus"

    @property
    def ready(self) -> str:
        """Pub/sub channel, no key: says which frames stream has a new frame."""
        return f"{self.prefix}frames:ready"

    @property
    def replicas(self) -> list[str]:
        """Hash of reports by replica, sorted set of when each expires, list of the latest steps of all."""
        return [f"{self.prefix}replicas:{{replicas}}:{kind}" for kind in ("reports", "deadlines", "steps")]

    def frames(self, partition: int, bulk: bool = False) -> str:
        return f"{self.prefix}frames:{'bulk:' if bulk else ''}{{{partition}}}"

    def leases(self, partition: int) -> str:
        return f"{self.prefix}leases:{{{partition}}}"

    def wake(self, partition: int) -> str:
        return f"{self.prefix}wake:{{{partition}}}"

    def places(self, client: str) -> str:
        """Sorted set: live sessions of a client, or of all, with the time until which they count."""
        return f"{self.prefix}places:{{{client}}}"

    def meta(self, partition: int, session_id: str) -> str:
        return self._session(partition, session_id, "meta")

    def input(self, partition: int, session_id: str) -> str:
        return self._session(partition, session_id, "in")

    def output(self, partition: int, session_id: str) -> str:
        return self._session(partition, session_id, "out")

    def session(self, partition: int, session_id: str) -> list[str]:
        """The three keys of a session, in the order in which every script takes them."""
        return [getattr(self, kind)(partition, session_id) for kind in ("meta", "input", "output")]

    def _session(self, partition: int, session_id: str, kind: str) -> str:
        return f"{self.prefix}session:{{{partition}}}:{session_id}:{kind}"


# Milliseconds. A test may replace it to move the clock by hand.
CLOCK = """
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""

KEEP = """
local function keep(ttl_ms, first)
  first = first or 1
  for i = first, first + 2 do redis.call('PEXPIRE', KEYS[i], ttl_ms) end
end
"""

# KEYS bus; ARGV partitions, generation -> the values in force
REGISTER = """
redis.call('HSETNX', KEYS[1], 'partitions', ARGV[1])
redis.call('HSETNX', KEYS[1], 'generation', ARGV[2])
return redis.call('HMGET', KEYS[1], 'partitions', 'generation')
"""

# KEYS meta, in, out, leases, wake; ARGV session, token, fingerprint, settings, ttl, client -> ok | exists
OPEN = """
local token = redis.call('HGET', KEYS[1], 'token')
if token then return token == ARGV[2] and 'ok' or 'exists' end
redis.call('HSET', KEYS[1], 'token', ARGV[2], 'state', 'open', 'epoch', 0, 'owner', '', 'fingerprint', ARGV[3],
  'settings', ARGV[4], 'admitted', 0, 'decided', 0, 'position', 0, 'first_position', 0, 'in_id', '0-0',
  'window', '', 'seen', now(), 'client', ARGV[6], 'connection', 1)
redis.call('DEL', KEYS[2], KEYS[3])
redis.call('ZADD', KEYS[4], 0, ARGV[1])
redis.call('XADD', KEYS[5], 'MAXLEN', 64, '*', 's', ARGV[1])
keep(ARGV[5])
return 'ok'
"""

# KEYS meta, leases; ARGV session -> fields, whether an owner holds the lease, ms since the client was seen
META = """
local fields = redis.call('HGETALL', KEYS[1])
if #fields == 0 then return false end
local deadline = redis.call('ZSCORE', KEYS[2], ARGV[1])
local held = deadline and tonumber(deadline) > now()
return {fields, held and 1 or 0, now() - redis.call('HGET', KEYS[1], 'seen')}
"""

# KEYS meta, in, out; ARGV client, token, ttl -> number of the new connection; 0 when there is no such session of his
ATTACH = """
local meta = redis.call('HMGET', KEYS[1], 'state', 'client', 'connection', 'attached')
if not meta[1] or meta[2] ~= ARGV[1] then return 0 end
if meta[4] == ARGV[2] then return tonumber(meta[3]) end
redis.call('HSET', KEYS[1], 'connection', meta[3] + 1, 'attached', ARGV[2])
if meta[1] ~= 'ended' then
  redis.call('HSET', KEYS[1], 'seen', now())
  keep(ARGV[3])
end
return meta[3] + 1
"""

# KEYS meta, in, out; ARGV connection, field, text, ttl -> 1 noted, 0 not: another connection, or no session any more
NOTE = """
if redis.call('HGET', KEYS[1], 'connection') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
if redis.call('HGET', KEYS[1], 'state') ~= 'ended' then keep(ARGV[4]) end
return 1
"""

# KEYS places; ARGV session, most, keep -> 1 counted, 0 full
PLACE = """
local time = now()
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', time)
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], time + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

# KEYS places; ARGV session
UNPLACE = """
return redis.call('ZREM', KEYS[1], ARGV[1])
"""

# KEYS bus; ARGV notice in ms, -1 to stop. Nobody heeds a drain that was announced an hour ago.
DRAIN = """
local time, notice = now(), tonumber(ARGV[1])
if notice < 0 then return redis.call('HDEL', KEYS[1], 'drain', 'drain_at') end
return redis.call('HSET', KEYS[1], 'drain', time, 'drain_at', time + notice)
"""

# KEYS bus; ARGV since -> ms until connections close; nothing where no drain concerns who runs since then
DRAINING = """
local drain = redis.call('HMGET', KEYS[1], 'drain', 'drain_at')
if not drain[1] or tonumber(drain[1]) < tonumber(ARGV[1]) or now() - drain[1] > 3600000 then return false end
return math.max(drain[2] - now(), 0)
"""

# KEYS bus -> the time
NOW = """
redis.call('HLEN', KEYS[1])
return now()
"""

# KEYS meta, in, out, frames; ARGV session, writer, request, credits, longest, time, message, ttl, channel, hint,
# connection ('' of a writer that needs none), counts -> {ok, seq} | full | late | ended | gone | taken
ADMIT = """
local meta = redis.call('HMGET', KEYS[1], 'state', 'admitted', 'decided', 'writer', 'request', 'connection')
if not meta[1] then return {'gone'} end
if ARGV[11] ~= '' and meta[6] ~= ARGV[11] then return {'taken'} end
local seq, request = tonumber(meta[2]), tonumber(ARGV[3])
if meta[4] == ARGV[2] and request <= tonumber(meta[5]) then
  if request == tonumber(meta[5]) then return {'ok', seq - 1} end
  return {'late', meta[5]}
end
if meta[1] ~= 'open' then return {'ended'} end
if seq - meta[3] >= tonumber(ARGV[4]) or redis.call('XLEN', KEYS[4]) >= tonumber(ARGV[5]) then return {'full'} end
redis.call('XADD', KEYS[4], '*', 's', ARGV[1], 'n', seq, 't', ARGV[6], 'm', ARGV[7])
redis.call('HSET', KEYS[1], 'admitted', seq + 1, 'writer', ARGV[2], 'request', ARGV[3], 'seen', now(),
  'time', ARGV[6], 'counts', ARGV[12])
keep(ARGV[8])
redis.call('PUBLISH', ARGV[9], ARGV[10])
return {'ok', seq}
"""

# KEYS meta, in, out; ARGV writer, number, kind, query_id, most, message, ttl, connection -> ok | full | ended | gone |
# taken. Queries are counted until the log says that they were consumed; other input until the log goes on. The ids of
# the latest queries are kept, so that a client that comes back may ask again what may not have arrived.
SEND = """
local meta = redis.call('HMGET', KEYS[1], 'state', 'asked', 'consumed', 'changes', 'changes_at', 'position',
  'sender', 'sent', 'queries', 'connection')
if not meta[1] then return 'gone' end
if ARGV[8] ~= '' and meta[10] ~= ARGV[8] then return 'taken' end
if meta[7] == ARGV[1] and tonumber(ARGV[2]) <= tonumber(meta[8]) then return 'ok' end
local queries = meta[9] or '\\n'
if ARGV[3] == 'query' and queries:find('\\n' .. ARGV[4] .. '\\n', 1, true) then return 'ok' end
if meta[1] == 'ended' then return 'ended' end
local most = tonumber(ARGV[5])
local asked, changes = tonumber(meta[2] or 0), 0
if ARGV[3] == 'query' then
  if asked - (meta[3] or 0) >= most then return 'full' end
  asked = asked + 1
elseif ARGV[3] ~= 'end' then
  if meta[5] == meta[6] then changes = tonumber(meta[4]) end
  if changes >= most then return 'full' end
  redis.call('HSET', KEYS[1], 'changes', changes + 1, 'changes_at', meta[6])
end
redis.call('XADD', KEYS[2], '*', 'm', ARGV[6])
redis.call('HSET', KEYS[1], 'asked', asked, 'sender', ARGV[1], 'sent', ARGV[2], 'seen', now())
if ARGV[3] == 'query' then
  redis.call('HSET', KEYS[1], 'queries', string.sub(queries .. ARGV[4] .. '\\n', -4096))
end
if ARGV[3] == 'end' then redis.call('HSET', KEYS[1], 'state', 'ending') end
keep(ARGV[7])
return 'ok'
"""

# KEYS meta, in, out of each session; ARGV ttl, whether its client is there (of each) -> {state or '', position} of each
TOUCH = """
local found = {}
for i = 1, #KEYS, 3 do
  local meta = redis.call('HMGET', KEYS[i], 'state', 'position')
  found[#found + 1] = {meta[1] or '', tonumber(meta[2] or 0)}
  if meta[1] and meta[1] ~= 'ended' and ARGV[1 + (i + 2) / 3] == '1' then
    keep(ARGV[1], i)
    redis.call('HSET', KEYS[i], 'seen', now())
  end
end
return found
"""

# KEYS meta, in, out, frames; ARGV group, entry id, message, ttl -> ok | duplicate | gone
PUBLISH = """
local pending = redis.pcall('XPENDING', KEYS[4], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err or #pending == 0 then return 'duplicate' end
local state = redis.call('HGET', KEYS[1], 'state')
local wanted = state and state ~= 'ended'
if wanted then
  redis.call('XADD', KEYS[2], '*', 'm', ARGV[3])
  keep(ARGV[4])
end
redis.call('XACK', KEYS[4], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[4], ARGV[2])
return wanted and 'ok' or 'gone'
"""

# KEYS frames; ARGV group, consumer, entry ids... -> how many of them this consumer still has: they are idle no longer.
# What another has taken over meanwhile is left to it.
HOLD = """
local kept = 0
for i = 3, #ARGV do
  local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if not pending.err and #pending > 0 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    kept = kept + 1
  end
end
return kept
"""

# KEYS frames; ARGV group, idle ms -> names of consumers that were removed: idle for long, nothing pending
FORGET = """
local removed = {}
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if consumers.err then return removed end
for _, fields in ipairs(consumers) do
  local consumer = {}
  for i = 1, #fields, 2 do consumer[fields[i]] = fields[i + 1] end
  if consumer.pending == 0 and consumer.idle > tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
    removed[#removed + 1] = consumer.name
  end
end
return removed
"""

# KEYS leases; ARGV offset, count -> sessions whose lease is over
EXPIRED = """
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now(), 'LIMIT', ARGV[1], ARGV[2])
"""

# KEYS leases, frames, bulk frames -> sessions that nobody holds, age in ms of the oldest frame that is not encoded
LOAD = """
local time, age = now(), 0
for i = 2, 3 do
  local oldest = redis.call('XRANGE', KEYS[i], '-', '+', 'COUNT', 1)
  if oldest[1] then age = math.max(age, time - string.match(oldest[1][1], '%d+')) end
end
return {redis.call('ZCOUNT', KEYS[1], '-inf', time), age}
"""

# KEYS meta, leases; ARGV session, token, owner, fingerprint, lease -> epoch; 0 not to be had, -1 no session any more
CLAIM = """
local meta = redis.call('HMGET', KEYS[1], 'state', 'fingerprint', 'epoch', 'claim', 'offered', 'offered_until')
if not meta[1] or meta[1] == 'ended' then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return -1
end
if meta[4] == ARGV[2] then return tonumber(meta[3]) end
local deadline, time = redis.call('ZSCORE', KEYS[2], ARGV[1]), now()
if meta[5] and meta[5] ~= ARGV[3] and tonumber(meta[6]) > time then return 0 end
if meta[2] ~= ARGV[4] or not deadline or tonumber(deadline) > time then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[2], time + ARGV[5], ARGV[1])
redis.call('HSET', KEYS[1], 'epoch', meta[3] + 1, 'owner', ARGV[3], 'claim', ARGV[2])
redis.call('HDEL', KEYS[1], 'offered', 'offered_until')
return meta[3] + 1
"""

# KEYS leases, meta of each session; ARGV lease, then session and epoch of each -> 1 renewed, 0 lost, of each
RENEW = """
local renewed = {}
redis.call('ZREM', KEYS[1], '')
for i = 2, #KEYS do
  local meta = redis.call('HMGET', KEYS[i], 'state', 'epoch')
  local held = meta[1] and meta[1] ~= 'ended' and meta[2] == ARGV[2 * i - 1]
  if held then redis.call('ZADD', KEYS[1], now() + ARGV[1], ARGV[2 * i - 2]) end
  renewed[#renewed + 1] = held and 1 or 0
end
return renewed
"""

# KEYS meta, leases, wake; ARGV session, epoch, heir or '', ms -> 1 released, 0 lost. The epoch goes up so that
# nothing of this owner that is still under way, a renewal above all, has an effect any more. Nobody but the heir
# may claim the session for that many ms.
RELEASE = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[2] then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[1], 'epoch', ARGV[2] + 1, 'owner', '')
if redis.call('HGET', KEYS[1], 'state') ~= 'ended' then
  redis.call('ZADD', KEYS[2], 0, ARGV[1])
  if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], 'offered', ARGV[3], 'offered_until', now() + ARGV[4]) end
  redis.call('XADD', KEYS[3], 'MAXLEN', 64, '*', 's', ARGV[1])
end
return 1
"""

# KEYS meta, in, out; ARGV epoch, position, decided, consumed queries, resume, ttl, entries...
# -> {ok | duplicate | stale, position of the log}
# Two marks (time, position) at least `resume` apart let TRIM keep what a returning client may ask for.
APPEND = """
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'position', 'state', 'decided', 'consumed', 'mark', 'mark_at')
local position, first = tonumber(meta[2] or 0), tonumber(ARGV[2])
if meta[1] ~= ARGV[1] or meta[3] == 'ended' then return {'stale', position} end
local count = #ARGV - 6
if first + count <= position and count > 0 then return {'duplicate', position} end
if first ~= position then return {'stale', position} end
for i = 1, count do redis.call('XADD', KEYS[3], string.format('%d-0', first + i), 'm', ARGV[6 + i]) end
redis.call('HSET', KEYS[1], 'position', first + count, 'decided', math.max(ARGV[3], meta[4]),
  'consumed', (meta[5] or 0) + ARGV[4])
local time = now()
if not meta[7] or time - meta[7] >= tonumber(ARGV[5]) then
  redis.call('HSET', KEYS[1], 'old_mark', meta[6] or 0, 'old_mark_at', meta[7] or time, 'mark', first, 'mark_at', time)
end
keep(ARGV[6])
return {'ok', first + count}
"""

# KEYS meta, in, out; ARGV epoch, window, in_id, position, resume, ttl -> 1 trimmed, 0 lost
TRIM = """
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'state', 'first_position', 'mark', 'mark_at', 'old_mark',
  'old_mark_at')
if meta[1] ~= ARGV[1] or meta[2] == 'ended' then return 0 end
local time, resume, safe = now(), tonumber(ARGV[5]), 0
if meta[5] and time - meta[5] >= resume then safe = tonumber(meta[4])
elseif meta[7] and time - meta[7] >= resume then safe = tonumber(meta[6]) end
local first = math.max(meta[3], math.min(ARGV[4], safe))
keep(ARGV[6])
redis.call('HSET', KEYS[1], 'window', ARGV[2], 'in_id', ARGV[3], 'first_position', first)
redis.call('XTRIM', KEYS[2], 'MINID', ARGV[3])
redis.call('XTRIM', KEYS[3], 'MINID', string.format('%d-0', first + 1))
return 1
"""

# KEYS meta, in, out, leases; ARGV session, epoch, ttl -> 1 ended, 0 lost
END = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[2] then return 0 end
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[1], 'state', 'ended', 'owner', '')
keep(ARGV[3])
return 1
"""

# KEYS meta, in, out, leases; ARGV session, message, ttl -> 1 ended, 0 when an owner holds it
ABANDON = """
local meta = redis.call('HMGET', KEYS[1], 'state', 'epoch', 'position')
if not meta[1] or meta[1] == 'ended' then return 1 end
local deadline = redis.call('ZSCORE', KEYS[4], ARGV[1])
if deadline and tonumber(deadline) > now() then return 0 end
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('XADD', KEYS[3], string.format('%d-0', meta[3] + 1), 'm', ARGV[2])
redis.call('HSET', KEYS[1], 'state', 'ended', 'epoch', meta[2] + 1, 'owner', '', 'position', meta[3] + 1)
keep(ARGV[3])
return 1
"""

# KEYS reports, deadlines, steps; ARGV name, report, ttl, most replicas, steps kept, steps... -> 1, 0 when too many
REPORT = """
local time = now()
local gone = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', time)
for _, name in ipairs(gone) do
  redis.call('HDEL', KEYS[1], name)
  redis.call('ZREM', KEYS[2], name)
end
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[4]) and not redis.call('ZSCORE', KEYS[2], ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], time + ARGV[3], ARGV[1])
for i = 6, #ARGV do redis.call('RPUSH', KEYS[3], ARGV[i]) end
redis.call('LTRIM', KEYS[3], -ARGV[5], -1)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('PEXPIRE', KEYS[3], 600 * ARGV[3])
return 1
"""

# KEYS reports, deadlines, steps; ARGV name
RETIRE = """
redis.call('HDEL', KEYS[1], ARGV[1])
return redis.call('ZREM', KEYS[2], ARGV[1])
"""

# KEYS reports, deadlines, steps; ARGV most -> reports that have not expired
REPORTS = """
local names = redis.call('ZRANGEBYSCORE', KEYS[2], now(), '+inf', 'LIMIT', 0, ARGV[1])
local found = {}
for _, name in ipairs(names) do found[#found + 1] = redis.call('HGET', KEYS[1], name) or nil end
return found
"""

# KEYS reports, deadlines, steps -> steps, oldest first
STEPS = """
return redis.call('LRANGE', KEYS[3], 0, -1)
"""


def texts() -> dict[str, str]:
    """The scripts by name, each with what it needs before it."""
    own = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, str)}
    return {
        name: CLOCK + KEEP + text for name, text in own.items() if "redis.call" in text and text not in (CLOCK, KEEP)
    }
