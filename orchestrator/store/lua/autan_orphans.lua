-- autan_orphans: live requests whose owner is no registered ingress any more.
-- ARGV  ingress_id (of the caller), limit (at most 1000)
-- Reply OK, ids...
-- Promise: reads only. Never names a request whose owner's registration holds; names a request whose owner's
-- registration ended, or whose owner registered again since, unless the limit is reached before.
local function autan_orphans(keys, args)
  local c = open('autan_orphans', keys, args)
  take_name(c, 'ingress_id')
  local limit = take_int(c, 'limit', 0, 1000)
  taken_all(c)
  local reply = {'OK'}
  for _, owner in ipairs(redis.call('SMEMBERS', k(c, 'owners'))) do
    local ingress, epoch = string.match(owner, '^(.*)|(%d+)$')
    local g = redis.call('HMGET', k_ingress(c, ingress), 'epoch', 'expires_ms')
    local left = limit + 1 - #reply
    if left <= 0 then break end
    if g[1] ~= epoch or tonumber(g[2]) <= c.now then
      for _, id in ipairs(redis.call('SRANDMEMBER', k_own(c, ingress, epoch), left)) do reply[#reply + 1] = id end
    end
  end
  return reply
end
redis.register_function{function_name = 'autan_orphans', callback = autan_orphans, flags = {'no-writes'}}
