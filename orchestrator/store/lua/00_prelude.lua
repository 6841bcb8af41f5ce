-- Shared by every function of the library: keys, time, arguments, states, hints.
--
-- Keys, all under KEYS[1] = `{autan:<cluster>}` (one hash tag, one slot):
--   :r:<id>            HASH   the request; never expires while it is live
--   :t:<id>            STRING the journal: accepted tokens as little-endian uint32; n = STRLEN / 4
--   :ready             ZSET   QUEUED ids; score = class, then order of submission
--   :lease             ZSET   ASSIGNED, PREFILLING and DECODING ids; score = end of the lease in ms
--   :deadline          ZSET   live ids; score = deadline in ms
--   :live              ZSET   live ids; score = submission in ms
--   :own:<ing>|<epoch> SET    live ids that this registration of an ingress owns;  :owners SET of the non-empty ones
--   :i:<inst>          HASH   an instance, its load counters, and in_seq of its inbox; never removed
--   :instances         SET    names of all instances
--   :in:<inst>         ZSET   inbox: score = sequence number, member = kind|id|epoch
--   :parts:<inst>|<incarnation>  SET of ids in which this incarnation has an open role
--   :sweep             SET    <inst>|<incarnation> whose parts the next reap requeues
--   :g:<ingress>       HASH   addr, epoch, expires_ms
--   :leader            HASH   id, epoch, expires_ms
--   :counters          HASH   totals since the store was created, and its generation
--
-- A live id is in exactly one of :ready (QUEUED) and :lease (the other live states), and in :deadline, :live and :own.
-- p_open and d_open of a request say whether the load of that role is charged to the instance: it is charged by
-- assign and undone by whoever flips the mark, so exactly once.
--
-- A move of a DECODING request to another instance is open while m_open is '1': m, m_inc name the target, whose load and part
-- are those of a D. Its epoch m_epoch was given out when the move began and becomes the request's with the commit; it is
-- never given out again, whether or not the move is committed.
--
-- Every function reads and checks everything before its first write: a script is atomic but never rolled back.

local ID_BYTES = 64
local MOVE_RECORDS = 256          -- lines of the log of moves
local NOTE_BYTES = 256
local MAX_BYTES = 16 * 1024 * 1024     -- of one binary argument
local MAX_INT = 9007199254740991       -- 2^53 - 1: numbers are doubles
local PICK_BYTES = 8 * 1024 * 1024     -- of specs and journals in one reply of pick
local CLASS_STEP = 1125899906842624    -- 2^50: above any order of submission

-- Lifecycle of a request. Whatever is not listed is illegal.
local MOVES = {
  QUEUED = {ASSIGNED = true, DONE = true, FAILED = true, CANCELLED = true, EXPIRED = true},
  ASSIGNED = {PREFILLING = true, QUEUED = true, DONE = true, FAILED = true, CANCELLED = true, EXPIRED = true, DEAD = true},
  PREFILLING = {DECODING = true, QUEUED = true, DONE = true, FAILED = true, CANCELLED = true, EXPIRED = true, DEAD = true},
  DECODING = {QUEUED = true, DONE = true, FAILED = true, CANCELLED = true, EXPIRED = true, DEAD = true},
}
local LIVE = {QUEUED = true, ASSIGNED = true, PREFILLING = true, DECODING = true}
local PLACED = {ASSIGNED = true, PREFILLING = true, DECODING = true}
local HELD = {PREFILLING = true, DECODING = true}

-- Lifecycle of an incarnation of an instance. LOST and STOPPED end it; only a registration follows, as the next one.
local INSTANCE_MOVES = {
  STARTING = {STARTING = true, READY = true, DRAINING = true},
  READY = {READY = true, DRAINING = true},
  DRAINING = {DRAINING = true, READY = true},
}
local ALIVE = {STARTING = true, READY = true, DRAINING = true}

local function text(number)
  if number == 0 then return '0' end  -- also minus zero, which no command takes for an integer
  return string.format('%.0f', number)
end

-- Arguments: a call is a table that carries the base key, the server's time and a cursor over ARGV.

local function refuse(c, message)
  error({err = 'ERR ' .. c.name .. ': ' .. message})
end

local function open(name, keys, args)
  local c = {name = name, args = args, at = 0, hinted = {}}
  if #keys ~= 1 then refuse(c, 'takes one key, the base key of the cluster') end
  c.base = keys[1]
  local time = redis.call('TIME')
  c.now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  return c
end

local function take(c, what)
  c.at = c.at + 1
  local value = c.args[c.at]
  if value == nil then refuse(c, 'argument ' .. c.at .. ' (' .. what .. ') is missing') end
  return value
end

local function take_bytes(c, what)
  local value = take(c, what)
  if #value > MAX_BYTES then refuse(c, what .. ' is longer than ' .. MAX_BYTES .. ' bytes') end
  return value
end

local function is_name(value)
  return #value >= 1 and #value <= ID_BYTES and not string.find(value, '[^%w_.-]')
end

local function take_name(c, what)
  local value = take(c, what)
  if not is_name(value) then refuse(c, what .. ' is not of [A-Za-z0-9_.-], 1 to 64 characters') end
  return value
end

-- A name, or nothing.
local function take_optional_name(c, what)
  if c.args[c.at + 1] == '' then return take(c, what) end
  return take_name(c, what)
end

local function take_int(c, what, low, high)
  local value = take(c, what)
  local number = string.find(value, '^-?%d+$') and #value <= 17 and tonumber(value)
  if not number or number < low or number > (high or MAX_INT) then
    refuse(c, what .. ' is no integer from ' .. text(low) .. ' to ' .. text(high or MAX_INT))
  end
  return number
end

-- An epoch or incarnation: as the canonical text that the hashes hold.
local function take_epoch(c, what)
  return text(take_int(c, what, 0))
end

local function take_one_of(c, what, allowed)
  local value = take(c, what)
  if not allowed[value] then refuse(c, what .. ' has an unknown value') end
  return value
end

local FLAGS = {['0'] = true, ['1'] = true}

local function take_flag(c, what)
  return take_one_of(c, what, FLAGS) == '1'
end

local function taken_all(c)
  if #c.args ~= c.at then refuse(c, 'takes ' .. c.at .. ' arguments, got ' .. #c.args) end
end

-- Keys.

local function k_request(c, id) return c.base .. ':r:' .. id end
local function k_journal(c, id) return c.base .. ':t:' .. id end
local function k_instance(c, instance) return c.base .. ':i:' .. instance end
local function k_inbox(c, instance) return c.base .. ':in:' .. instance end
local function k_parts(c, instance, incarnation) return c.base .. ':parts:' .. instance .. '|' .. incarnation end
local function k_ingress(c, ingress) return c.base .. ':g:' .. ingress end
local function k_own(c, ingress, epoch) return c.base .. ':own:' .. ingress .. '|' .. epoch end
local function k(c, name) return c.base .. ':' .. name end

-- Hints: lossy by contract, at most one per channel and call (per request for an ingress).

local function publish(c, channel, payload)
  local mark = channel .. '|' .. payload
  if c.hinted[mark] then return end
  c.hinted[mark] = true
  redis.call('PUBLISH', c.base .. ':hint:' .. channel, payload)
end

local function hint_core(c) publish(c, 'core', '') end
local function hint_instance(c, instance) publish(c, 'i:' .. instance, '') end
local function hint_ingress(c, ingress, id) publish(c, 'g:' .. ingress, id) end

local function count(c, what, by)
  redis.call('HINCRBY', k(c, 'counters'), what, by or 1)
end

-- A refusal of a stale actor changes nothing but this counter.
local function stale(c, ...)
  count(c, 'stale_refused')
  return {'STALE', ...}
end

-- The generation names this content of the store: another number means that the store was wiped in between.
local function mark_generation(c)
  redis.call('HSETNX', k(c, 'counters'), 'generation', text(c.now))
end

-- True while the caller is the leader of record. A lease that ended but that nobody took still fences everyone else.
local function leads(c, leader, epoch)
  local held = redis.call('HMGET', k(c, 'leader'), 'id', 'epoch')
  return held[1] == leader and held[2] == epoch
end
