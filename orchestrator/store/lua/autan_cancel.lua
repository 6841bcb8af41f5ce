-- autan_cancel: ends a live request on behalf of its tenant or an operator.
-- ARGV  id, tenant ("" = any), reason, retain_ms
--       reason "deadline" is the owning ingress that stopped waiting: EXPIRED, as if reap had come by
-- Reply OK, CANCELLED or EXPIRED | DUPLICATE, state (it had ended already) | GONE (no such request of this tenant)
-- Promise: the epoch grows by one, so whoever held the request is fenced at once and finds a REVOKE in its inbox.
local function autan_cancel(keys, args)
  local c = open('autan_cancel', keys, args)
  local id = take_name(c, 'id')
  local tenant = take_bytes(c, 'tenant')
  local reason = take_bytes(c, 'reason')
  local retain_ms = take_int(c, 'retain_ms', 1)
  taken_all(c)
  local r = load_request(c, id)
  if not r or (tenant ~= '' and r.tenant ~= tenant) then return {'GONE'} end
  if not LIVE[r.state] then return {'DUPLICATE', r.state} end
  local state = reason == 'deadline' and 'EXPIRED' or 'CANCELLED'
  terminate(c, r, state, reason, retain_ms)
  redis.call('HINCRBY', k_request(c, id), 'epoch', 1)
  return {'OK', state}
end
redis.register_function{function_name = 'autan_cancel', callback = autan_cancel, flags = {'allow-oom'}}
