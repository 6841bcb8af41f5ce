-- autan_lead: takes or keeps the leader lease of the core.
-- ARGV  candidate_id (unique per process), ttl_ms, epoch ("0" = not leading)
-- Reply OK, epoch, 1, now_ms (leads, under this epoch) | OK, epoch of the other, 0, now_ms
-- Promise: one leader epoch at a time, and epochs only grow. A candidate that comes without an epoch gets a new one
-- even if the lease is under its own id: a reply that was lost and a restart look alike.
local function autan_lead(keys, args)
  local c = open('autan_lead', keys, args)
  local candidate = take_name(c, 'candidate_id')
  local ttl_ms = take_int(c, 'ttl_ms', 0)
  local epoch = take_epoch(c, 'epoch')
  taken_all(c)
  local key = k(c, 'leader')
  local held = redis.call('HMGET', key, 'id', 'epoch', 'expires_ms')
  local current = held[2] or '0'
  local mine = held[1] == candidate
  local free = not held[3] or tonumber(held[3]) <= c.now
  if mine and epoch == current then
    redis.call('HSET', key, 'expires_ms', text(c.now + ttl_ms))
    return {'OK', current, 1, text(c.now)}
  end
  if not free and not (mine and epoch == '0') then return {'OK', current, 0, text(c.now)} end
  current = text(tonumber(current) + 1)
  mark_generation(c)
  redis.call('HSET', key, 'id', candidate, 'epoch', current, 'expires_ms', text(c.now + ttl_ms))
  return {'OK', current, 1, text(c.now)}
end
redis.register_function{function_name = 'autan_lead', callback = autan_lead, flags = {'allow-oom'}}
