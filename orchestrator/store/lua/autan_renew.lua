-- autan_renew: an instance beats, reports, and keeps the leases of what it holds.
-- ARGV  instance_id, incarnation, state (STARTING, READY, DRAINING), stats, lease_ms, k (at most 4096),
--       then k x (id, epoch, what: "h" = holds it, "e" = expects it or keeps a remainder of it)
-- Reply OK, now_ms, want_drain, j, j x (id that is not, or not any more, this incarnation's in that way at that epoch)
--       | STALE (LOST, STOPPED or superseded: drop everything, register anew) | GONE (no such instance)
--       | STATE, state (no such move: a READY instance never goes back to STARTING)
-- Promise: "h" is kept while this incarnation is the holder at that epoch; the lease then ends lease_ms from now.
-- "e" is kept while the request lives at that epoch and this incarnation is its P or D, or while a move of that epoch to this
-- incarnation is open; no lease is touched.
local WHATS = {h = true, e = true}

local function still_mine(r, item, instance, incarnation)
  if r and item.what == 'e' and r.m_open == '1' and r.m_epoch == item.epoch then
    return is_part(r, 'm', instance, incarnation)
  end
  if not r or r.epoch ~= item.epoch or not LIVE[r.state] then return false end
  if item.what == 'h' then return HELD[r.state] and r.holder == instance and r.holder_inc == incarnation end
  return is_part(r, 'p', instance, incarnation) or is_part(r, 'd', instance, incarnation)
end

local function autan_renew(keys, args)
  local c = open('autan_renew', keys, args)
  local instance = take_name(c, 'instance_id')
  local incarnation = take_epoch(c, 'incarnation')
  local state = take_one_of(c, 'state', ALIVE)
  local stats = take_bytes(c, 'stats')
  local lease_ms = take_int(c, 'lease_ms', 0)
  local items = {}
  for at = 1, take_int(c, 'k', 0, 4096) do
    items[at] = {id = take_name(c, 'id'), epoch = take_epoch(c, 'epoch'), what = take_one_of(c, 'what', WHATS)}
  end
  taken_all(c)
  local key = k_instance(c, instance)
  local i = redis.call('HMGET', key, 'state', 'incarnation', 'want_drain')
  if not i[1] then return {'GONE'} end
  if i[2] ~= incarnation or not ALIVE[i[1]] then return stale(c) end
  if not INSTANCE_MOVES[i[1]][state] then return {'STATE', i[1]} end
  redis.call('HSET', key, 'state', state, 'stats', stats, 'beat_ms', text(c.now))
  local lease, lost = k(c, 'lease'), {}
  for _, item in ipairs(items) do
    local r = load_request(c, item.id)
    if not still_mine(r, item, instance, incarnation) then
      lost[#lost + 1] = item.id
    elseif item.what == 'h' then
      redis.call('ZADD', lease, text(c.now + lease_ms), item.id)
    end
  end
  if i[1] ~= state then hint_core(c) end
  local reply = {'OK', text(c.now), i[3], #lost}
  for _, id in ipairs(lost) do reply[#reply + 1] = id end
  return reply
end
redis.register_function{function_name = 'autan_renew', callback = autan_renew, flags = {'allow-oom'}}
