"""What Redis runs for the lanes, each script in one step that nothing can come between.

Lua only; keys and meaning are told in lanes.py. The time is always Redis's own: the clocks of listener and
workers need not agree.
"""

# Claims the lanes that no living worker drains and returns them: they need an arq job. Rings for the others,
# and tells what has come, where that is little: who hears it need not ask. The message: base and format in a
# line, a line for each lane (name, then id and length of each entry), an empty line, and the entries.
_WAKE = """
local function wake(names, claims, prefix, patience, base, news)
  local cold, warm, told = {}, {}, {}
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  for _, name in ipairs(names) do
    local claim = redis.call('HGET', claims, name)
    local queued = claim and string.match(claim, '^queued:(%d+)')
    if queued and now - tonumber(queued) < patience then
      -- its job is on the way
    elseif claim and not queued and redis.call('EXISTS', prefix .. ':worker:' .. claim) == 1 then
      local new = news and news[name]
      warm[claim] = (warm[claim] or (base .. '\\te')) .. '\\n' .. name .. (new and new[1] or '')
      told[claim] = (told[claim] or '') .. (new and new[2] or '')
    else
      -- Whoever takes it next is to know that a worker has died over it.
      local died = claim and (not queued or string.sub(claim, -1) == '!')
      redis.call('HSET', claims, name, 'queued:' .. string.format('%.0f', now) .. (died and '!' or ''))
      cold[#cold + 1] = name
    end
  end
  for worker, list in pairs(warm) do
    redis.call('PUBLISH', prefix .. ':bell:' .. worker, list .. '\\n\\n' .. told[worker])
  end
  return cold
end
local base, prefix, patience = ARGV[1], ARGV[2], tonumber(ARGV[3])
"""

# A batch is written only where the generation's token and last id are the caller's: whatever happened to
# Redis (FLUSHALL, an older copy promoted, a second listener), a refusal is never read as "duplicate".
ADD = (
    _WAKE
    + """
local have = redis.call('HMGET', base .. ':meta', 'token', 'last')
if have[1] ~= ARGV[4] then return {'token', have[1] or ''} end
if have[2] ~= ARGV[5] then return {'last', have[2] or ''} end
local news, room = {}, 32768
for i = 7, #ARGV - 1, 3 do
  local name, id, entry = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  redis.call('XADD', base .. ':lane:' .. name, id, 'e', entry)
  room = room - #entry
  if room <= 0 or #ARGV >= 200 then
    -- All of a lane or nothing: whoever is told some of it would not look for the rest.
    news[name] = false
  elseif news[name] ~= false then
    local new = news[name] or {'', ''}
    news[name] = {new[1] .. '\\t' .. id .. '\\t' .. #entry, new[2] .. entry}
  end
end
local names = {}
local tops = cmsgpack.unpack(ARGV[#ARGV])
for i = 1, #tops, 2 do
  redis.call('HSET', base .. ':tops', tops[i], tops[i + 1])
  names[#names + 1] = tops[i]
end
redis.call('HSET', base .. ':meta', 'last', ARGV[6])
return {'added', wake(names, KEYS[1], prefix, patience, base, news)}
"""
)

RING = (
    _WAKE
    + """
return wake(cmsgpack.unpack(ARGV[4]), KEYS[1], prefix, patience, base)
"""
)

# Lanes with entries above what is applied, which nobody seems to drain: wake-ups may be lost, lanes may not.
SWEEP = (
    _WAKE
    + """
local tops = redis.call('HGETALL', base .. ':tops')
local passed = {}
local list = redis.call('HGETALL', base .. ':passed')
for i = 1, #list, 2 do passed[list[i]] = tonumber(string.match(list[i + 1], '^(%d+)')) end
local names = {}
for i = 1, #tops, 2 do
  local count = tonumber(string.match(tops[i + 1], ' (%d+) '))
  if count > (passed[tops[i]] or 0) then names[#names + 1] = tops[i] end
end
return wake(names, KEYS[1], prefix, patience, base)
"""
)

# 0: a living worker has it; 1: taken; 2: taken from a worker that has died.
CLAIM = """
local claim = redis.call('HGET', KEYS[1], ARGV[1])
if claim and claim ~= ARGV[3] and not string.match(claim, '^queued:')
   and redis.call('EXISTS', ARGV[2] .. ':worker:' .. claim) == 1 then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
if claim and claim ~= ARGV[3] and (string.sub(claim, -1) == '!' or not string.match(claim, '^queued:')) then
  return 2
end
return 1
"""

# A claim is given back only when nothing has come meanwhile; otherwise the wake-up that came would be lost.
RELEASE = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 1 end
local top = redis.call('HGET', ARGV[3] .. ':tops', ARGV[1])
if ARGV[4] == '0' and top then
  local passed = redis.call('HGET', ARGV[3] .. ':passed', ARGV[1])
  local count = passed and tonumber(string.match(passed, '^(%d+)')) or 0
  if tonumber(string.match(top, ' (%d+) ')) > count then return 0 end
end
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
"""

# First the token, so that the listener before can write no more; what it wrote until then is what stands.
TAKE_OVER = """
local last = redis.call('HGET', KEYS[1], 'last')
if not last then return false end
redis.call('HSET', KEYS[1], 'token', ARGV[1])
return last
"""

# Every worker tells how much it has to do, and hears it of all that live.
LOADS = """
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
local all = redis.call('HGETALL', KEYS[1])
local living = {}
for i = 1, #all, 2 do
  if all[i] == ARGV[2] or redis.call('EXISTS', ARGV[1] .. ':worker:' .. all[i]) == 1 then
    living[#living + 1] = all[i]
    living[#living + 1] = all[i + 1]
  else
    redis.call('HDEL', KEYS[1], all[i])
  end
end
return living
"""

# A lane goes to another worker, where it is ours to give and that one lives. Should the bell be lost, new
# entries and sweeps ring it again.
HAND_OVER = (
    _WAKE
    + """
local lane, mine, to = ARGV[4], ARGV[5], ARGV[6]
if redis.call('HGET', KEYS[1], lane) ~= mine or redis.call('EXISTS', prefix .. ':worker:' .. to) == 0 then
  return 0
end
redis.call('HSET', KEYS[1], lane, to)
wake({lane}, KEYS[1], prefix, patience, base)
return 1
"""
)
