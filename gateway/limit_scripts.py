"""What Redis does for limits, in Lua: each script is one step that nothing comes between. See `gateway.limit_redis`.

Of each key or address there are three keys: a hash (`r`, `t` the times at which requests and tokens are all there
again; `m` the month, `s` spent and `v` reserved units; `c` when this was written), a sorted set of requests in progress
by the time at which their lease ends, and a hash of what each has reserved. All times are Redis's own: where its clock
was set back, what was written before is set back with it.

Behind those of a script's own, the last key is the epoch of all counts, and the last argument the epoch that the worker
knows: where they differ, the counts may be lost, the script does nothing and answers {-1}, and the worker tells what it
knows (`BEGIN`, `RESTORE`, `RENEW`) before it asks again.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple


class Script(NamedTuple):
    text: str
    sha: str


def _script(*parts: str) -> Script:
    text = "\n".join(parts)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_COMMON: Final = """
local told = redis.call('TIME')
local now = tonumber(told[1]) + tonumber(told[2]) / 1000000
local WHOLE, TIME = '%.0f', '%.6f'
local function number(text) return tonumber(text or '') or 0 end
local function load(hash, live, month, base)
  local found = redis.call('HMGET', hash, 'r', 't', 'm', 's', 'v', 'c')
  local s = {r = number(found[1]), t = number(found[2]), m = found[3] or '', s = number(found[4]), v = number(found[5])}
  local back = number(found[6]) - now
  if back > 0 then
    s.r = s.r - back; s.t = s.t - back
    for _, one in ipairs(redis.call('ZRANGE', live, 0, -1)) do redis.call('ZINCRBY', live, -back, one) end
  end
  if s.v > 0 and redis.call('EXISTS', live) == 0 then s.v = 0 end
  if s.m < month then s.m = month; s.s = 0 end
  if s.m == month and s.s < base then s.s = base end
  return s
end
local function save(hash, s)
  redis.call('HSET', hash, 'r', string.format(TIME, s.r), 't', string.format(TIME, s.t), 'm', s.m,
    's', string.format(WHOLE, s.s), 'v', string.format(WHOLE, math.max(s.v, 0)), 'c', string.format(TIME, now))
  local keep = math.max(s.r, s.t, now) - now + 300
  if s.s > 0 then keep = math.max(keep, 3000000) end
  redis.call('EXPIRE', hash, math.ceil(keep))
end
local function end_leases(s, live, held)
  local ended = redis.call('ZRANGEBYSCORE', live, '-inf', now)
  for _, one in ipairs(ended) do
    s.v = s.v - number(redis.call('HGET', held, one))
    redis.call('HDEL', held, one)
    redis.call('ZREM', live, one)
  end
end
local function hold(s, live, held, id, units, lease)
  redis.call('ZADD', live, now + lease, id)
  redis.call('EXPIRE', live, math.ceil(lease * 2))
  if units ~= 0 then
    redis.call('HINCRBY', held, id, string.format(WHOLE, units))
    s.v = s.v + units
  end
  redis.call('EXPIRE', held, math.ceil(lease * 2))
end
"""

_KNOWN: Final = "if redis.call('GET', KEYS[#KEYS]) ~= ARGV[#ARGV] then return {-1} end"

# KEYS: three for each; ARGV: request, month, lease in s, then for each: per minute requests and tokens, streams at
# once, units a month, tokens and units asked for, units spent by the ledger's word.
# Answers {0, units spent of each}, or {place, reason, limit, remaining, ms to wait or -1, ms until all is there}.
ADMIT: Final = _script(
    _KNOWN,
    _COMMON,
    """
local id, month, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local states, answer = {}, {0}
for k = 1, #KEYS - 1, 3 do
  local at = 4 + (k - 1) / 3 * 7
  local place = (k + 2) / 3
  local rpm, tpm, streams, monthly = number(ARGV[at]), number(ARGV[at+1]), number(ARGV[at+2]), number(ARGV[at+3])
  local tokens, units = number(ARGV[at+4]), number(ARGV[at+5])
  local s = load(KEYS[k], KEYS[k+1], month, number(ARGV[at+6]))
  if streams > 0 or monthly > 0 then end_leases(s, KEYS[k+1], KEYS[k+2]) end
  if streams > 0 and redis.call('ZCARD', KEYS[k+1]) >= streams then
    save(KEYS[k], s)
    return {place, 'streams', streams, 0, 1000, 0}
  end
  local function take(full_at, limit, amount)
    local each = 60 / limit
    local after = math.max(full_at, now) + amount * each
    local wait = after - now - 60
    local left = math.max(math.floor((60 - math.max(full_at - now, 0)) / each + 0.00001), 0)
    if wait > 0.00001 then return nil, left, math.ceil(wait * 1000), math.ceil(math.max(full_at - now, 0) * 1000) end
    return after
  end
  if rpm > 0 then
    local after, left, wait, reset = take(s.r, rpm, 1)
    if not after then save(KEYS[k], s); return {place, 'requests', rpm, left, wait, reset} end
    s.next_r = after
  end
  if tpm > 0 then
    local after, left, wait, reset = take(s.t, tpm, tokens)
    if not after then
      save(KEYS[k], s)
      if tokens > tpm then wait = -1 end
      return {place, 'tokens', tpm, left, wait, reset}
    end
    s.next_t = after
  end
  if monthly > 0 and units > 0 and s.s + s.v + units > monthly then
    save(KEYS[k], s)
    local left = math.max(monthly - s.s, 0)
    local wait = -1
    if units <= left then wait = 1000 end
    return {place, 'spend', monthly, left, wait, 0}
  end
  s.leased = streams > 0 or monthly > 0
  s.units = monthly > 0 and units or 0
  states[place] = s
end
for place, s in ipairs(states) do
  local k = (place - 1) * 3 + 1
  s.r = s.next_r or s.r
  s.t = s.next_t or s.t
  if s.leased then hold(s, KEYS[k+1], KEYS[k+2], id, s.units, lease) end
  save(KEYS[k], s)
  answer[place + 1] = s.s
end
return answer
""",
)

# ARGV: request, month, units that it is to have reserved in all, so that it does no harm to ask twice; lease, then for
# each its units a month. Answers {1}, or {0} where there is not so much; less than before is always there.
EXTEND: Final = _script(
    _KNOWN,
    _COMMON,
    """
local id, month, units, lease = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local states = {}
for k = 1, #KEYS - 1, 3 do
  local s = load(KEYS[k], KEYS[k+1], month, 0)
  end_leases(s, KEYS[k+1], KEYS[k+2])
  s.more = units - number(redis.call('HGET', KEYS[k+2], id))
  if s.more >= 0 and s.s + s.v + s.more > number(ARGV[4 + (k + 2) / 3]) then save(KEYS[k], s); return {0} end
  states[(k + 2) / 3] = s
end
for place, s in ipairs(states) do
  local k = (place - 1) * 3 + 1
  hold(s, KEYS[k+1], KEYS[k+2], id, s.more, lease)
  save(KEYS[k], s)
end
return {1}
""",
)

# KEYS: one that says that this was done, then three for each. ARGV: request, month, units used, 1 at the end, then for
# each: tokens per minute, tokens to take (or, below 0, to give back), 1 where money is counted. Answers {1, units spent
# of each}, or {0} where it was done before.
SETTLE: Final = _script(
    _KNOWN,
    _COMMON,
    """
local answer = {1}
if not redis.call('SET', KEYS[1], '1', 'NX', 'EX', 900) then return {0} end
local id, month, units, is_end = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4] == '1'
for k = 2, #KEYS - 1, 3 do
  local at = 5 + (k - 2) / 3 * 3
  local tpm, tokens, counts_money = number(ARGV[at]), number(ARGV[at+1]), ARGV[at+2] == '1'
  local s = load(KEYS[k], KEYS[k+1], month, 0)
  if is_end then
    s.v = s.v - number(redis.call('HGET', KEYS[k+2], id))
    redis.call('HDEL', KEYS[k+2], id)
    redis.call('ZREM', KEYS[k+1], id)
  end
  if counts_money and s.m == month then s.s = s.s + units end
  if tpm > 0 then
    if tokens > 0 then s.t = math.max(s.t, now) end
    s.t = s.t + tokens * 60 / tpm
  end
  save(KEYS[k], s)
  answer[#answer + 1] = s.s
end
return answer
""",
)

# KEYS: three. ARGV: lease, then request and units of each in progress, whose leases begin anew.
RENEW: Final = _script(
    _COMMON,
    """
local lease = tonumber(ARGV[1])
local s = load(KEYS[1], KEYS[2], '', 0)
end_leases(s, KEYS[2], KEYS[3])
for at = 2, #ARGV, 2 do
  local id, units = ARGV[at], number(ARGV[at+1])
  if redis.call('ZSCORE', KEYS[2], id) then units = 0 end
  hold(s, KEYS[2], KEYS[3], id, units, lease)
end
save(KEYS[1], s)
return 1
""",
)

# KEYS: hash and requests in progress of each. ARGV: month and units that were spent in it, of each, at least.
RESTORE: Final = _script(
    _COMMON,
    """
for k = 1, #KEYS, 2 do
  save(KEYS[k], load(KEYS[k], KEYS[k+1], ARGV[k], number(ARGV[k+1])))
end
return 1
""",
)

# KEYS: the epoch, and one to write to: a Redis that only answers counts nothing. ARGV: the epoch where there is none.
BEGIN: Final = _script(
    """
redis.call('SET', KEYS[2], '1', 'EX', 60)
redis.call('SET', KEYS[1], ARGV[1], 'NX')
return redis.call('GET', KEYS[1])
""",
)
