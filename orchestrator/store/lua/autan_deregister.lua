-- autan_deregister: a worker process leaves.
-- ARGV  instance_id, incarnation
-- Reply OK (again too) | STALE (another incarnation registered since, or no such instance)
-- Promise: state STOPPED; what it took part in is requeued by the next reap, without waiting for leases.
local function autan_deregister(keys, args)
  local c = open('autan_deregister', keys, args)
  local instance = take_name(c, 'instance_id')
  local incarnation = take_epoch(c, 'incarnation')
  taken_all(c)
  local key = k_instance(c, instance)
  if redis.call('HGET', key, 'incarnation') ~= incarnation then return stale(c) end
  redis.call('HSET', key, 'state', 'STOPPED')
  end_incarnation(c, instance, incarnation)
  return {'OK'}
end
redis.register_function{function_name = 'autan_deregister', callback = autan_deregister, flags = {'allow-oom'}}
