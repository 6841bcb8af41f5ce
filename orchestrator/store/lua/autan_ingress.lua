-- autan_ingress: an ingress registers, or keeps its registration.
-- ARGV  ingress_id, addr, ttl_ms, epoch ("0": register anew under the next epoch; else renew that epoch)
-- Reply OK, epoch, now_ms | STALE (another process registered under this id since, or the store was wiped)
-- Promise: epochs of one ingress id only grow; what an older epoch owned is an orphan from then on.
local function autan_ingress(keys, args)
  local c = open('autan_ingress', keys, args)
  local ingress = take_name(c, 'ingress_id')
  local addr = take_bytes(c, 'addr')
  local ttl_ms = take_int(c, 'ttl_ms', 0)
  local epoch = take_epoch(c, 'epoch')
  taken_all(c)
  local key = k_ingress(c, ingress)
  local current = redis.call('HGET', key, 'epoch')
  if epoch == '0' then
    epoch = text((tonumber(current or '0')) + 1)
    mark_generation(c)
  elseif current ~= epoch then
    return stale(c)
  end
  redis.call('HSET', key, 'addr', addr, 'epoch', epoch, 'expires_ms', text(c.now + ttl_ms))
  return {'OK', epoch, text(c.now)}
end
redis.register_function{function_name = 'autan_ingress', callback = autan_ingress, flags = {'allow-oom'}}
